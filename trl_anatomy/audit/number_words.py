"""Numbers as a person would write them: with their unit, and no more digits than mean anything."""

import math

# The unit of what is told in per cent.
SHARE = "share"


def percent(share: float) -> str:
    """A share in per cent, as a person would say it.

    >>> percent(0.734), percent(0.004), percent(0.0), percent(1.0)
    ('73 %', '0.4 %', '0 %', '100 %')
    """
    value = 100 * share
    return f"{value:.1f} %" if 0 < value < 1 or 99 < value < 100 else f"{value:.0f} %"


def _minus(text: str) -> str:
    """A number as written, with a true minus sign; none at zero.

    >>> _minus("-1,200"), _minus("-0.0"), _minus("+0.00")
    ('−1,200', '0.0', '0.00')
    """
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("+-")


def points(value: float | None, sign: bool = True) -> str:
    """A share in percentage points, with a true minus sign.

    >>> points(0.4134), points(-0.02)
    ('+41.3', '−2.0')
    """
    if value is None or math.isnan(value):
        return "n/a"
    return _minus(f"{100 * value:{'+' if sign else ''}.1f}")


def deviations(value: float | None) -> str:
    """A number of standard deviations, with a true minus sign.

    >>> deviations(0.4134), deviations(-0.001)
    ('+0.41', '0.00')
    """
    if value is None or math.isnan(value):
        return "n/a"
    return _minus(f"{value:+.2f}")


def amount_difference(value: float | None) -> str:
    """A difference of two amounts, with a true minus sign and no more digits than mean anything.

    >>> amount_difference(153.4), amount_difference(-0.07), amount_difference(None)
    ('+153', '−0.1', 'n/a')
    """
    if value is None or math.isnan(value):
        return "n/a"
    return _minus(f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+.1f}")


def written(value: float, unit: str) -> str:
    """A rate or an amount with its unit.

    >>> written(0.671, SHARE), written(153.4, "words"), written(2.04, "")
    ('67 %', '153 words', '2.0')
    """
    if unit == SHARE:
        return percent(value)
    return f"{number(round(value)) if value >= 100 else format(value, '.1f')} {unit}".rstrip()


def number(value: int) -> str:
    """An integer with thousands apart."""
    return f"{value:,}"


def probability(value: float | None) -> str:
    """A p- or q-value, no more digits than mean anything."""
    if value is None or math.isnan(value):
        return "n/a"
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def between(low: float | None, high: float | None, unit: str) -> str:
    """An interval of differences, in points of 100 for shares.

    >>> between(0.3, 0.42, SHARE), between(-12.3, 4.0, "words")
    ('+30.0 … +42.0', '−12.3 … +4.0')
    """
    ends = [points(end) if unit == SHARE else amount_difference(end) for end in (low, high)]
    return " … ".join(ends)


def apart(difference: float | None, unit: str) -> str:
    """A difference of two rates or amounts, with its unit.

    >>> apart(0.358, SHARE), apart(89.41, "words")
    ('+35.8 points', '+89.4 words')
    """
    if unit == SHARE:
        return f"{points(difference)} points"
    return f"{amount_difference(difference)} {unit}".rstrip()
