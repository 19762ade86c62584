import xml.etree.ElementTree as ElementTree

import numpy as np

from roc import plots


def _figure():
  figure, (ax,) = plots.panels()
  plots.curve(ax, [0, 1, 2], [0.1, np.nan, 0.3], label="a", colour="blue")
  plots.band(ax, [0, 1, 2], [0, 0, 0], [1, 1, 1], colour="blue")
  plots.finish(ax, "Title <&>", is_percent=True)
  return figure


def test_colours_follow_the_background():
  svg = plots.to_svg(_figure())
  assert "var(--blue)" in svg
  assert "var(--ink)" in svg
  for shade, _ in plots.COLOURS.values():
    assert shade not in svg


def test_equal_figures_give_equal_text_without_common_ids():
  svg = plots.to_svg(_figure())
  assert svg == plots.to_svg(_figure())
  assert 'id="axes_1"' not in svg


def test_standalone_svg_is_whole_xml_with_both_palettes():
  svg = plots.to_svg(_figure(), is_standalone=True)
  root = ElementTree.fromstring(svg.encode())
  assert root.tag.endswith("svg")
  assert "prefers-color-scheme:dark" in svg
  assert "Title &lt;&amp;&gt;" in svg


def test_light_shades_can_be_told_apart():
  shades = [shade for shade, _ in plots.COLOURS.values()]
  assert len(set(shades)) == len(shades)


def test_png_is_one():
  assert plots.to_png(_figure()).startswith(b"\x89PNG")


def test_running_mean_by_hand():
  values = np.array([1.0, np.nan, 4.0, 7.0])
  np.testing.assert_allclose(
    plots.running_mean(values, 3), [1.0, 2.5, 5.5, 5.5]
  )
  assert np.isnan(plots.running_mean(np.array([np.nan]), 3)).all()
