"""Before and after: rollouts, rates, recovery, predicted against observed."""
