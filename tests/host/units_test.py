"""Which words and signs behind a value are its unit."""

import pytest

from roc.host import units


@pytest.mark.parametrize(
  ("text", "bare", "unit"),
  [
    ("7 cm", "7", "cm"),
    ("7cm^2", "7", "cm^2"),
    ("7 square feet", "7", "ft^2"),
    ("7\\text{ cubic inches}", "7", "in^3"),
    ("7\\text{ apples}", "7", ""),
    ("7 apples", "7 apples", ""),
    ("7 m", "7 m", ""),
    ("7\\text{ m}", "7", "m"),
    ("7m", "7m", ""),
    ("7 ms", "7 ms", ""),
    ("7 units", "7", ""),
    ("7\\text{ square units}", "7", ""),
    ("\\frac{1}{2} \\mathrm{ hours}", "\\frac{1}{2}", "h"),
    ("x\\text{ cm}", "x", "cm"),
    ("x\\text{ cats}", "x\\text{ cats}", ""),
    ("36\\pi\\text{ cm}^2", "36\\pi", "cm^2"),
    ("36\\pi \\mathrm{in}", "36\\pi", "in"),
    ("36\\pi square units", "36\\pi", ""),
    ("2r cm", "2r", "cm"),
    ("2r m", "2r m", ""),
    ("ten cm", "ten cm", ""),
    ("5\\textnormal{ miles}", "5", "mi"),
    ("5 \\text{ or }", "5 \\text{ or }", ""),
    ("5\\text{ or 6}", "5\\text{ or 6}", ""),
    ("5\\text{ if lucky}", "5\\text{ if lucky}", ""),
    ("\\text{cm}", "\\text{cm}", ""),
    ("50\\%", "50", "%"),
    ("50 %", "50", "%"),
    ("50 percent", "50", "%"),
    ("50\\% \\text{ of them}", "50", "%"),
    ("\\%", "\\%", ""),
    ("30^\\circ", "30", "deg"),
    ("30 degrees", "30", "deg"),
    ("-\\$5.50", "-5.50", "$"),
    ("$5", "5", "$"),
    ("5\\$", "5", "$"),
    ("\\$5 \\text{ per hour}", "5", "$"),
    ("€5", "5", "€"),
    ("101_2", "101", "_2"),
    ("101_{10}", "101", "_10"),
    ("x_2", "x_2", ""),
    ("x+3t", "x+3t", ""),
  ],
)
def test_split(text, bare, unit):
  assert units.split(text) == units.Quantity(bare, unit)
