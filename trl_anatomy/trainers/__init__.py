"""The drop-in trainers and the seams into TRL that they share."""
