"""Which image a program is forked from, by a glance at its imports.

A wrong guess costs time only: every module can be imported in every image.
"""

import re

BARE = "bare"
# What each image has loaded, cheapest first; `bare` has the standard modules.
IMAGES: dict[str, tuple[str, ...]] = {
  BARE: (),
  "maths": ("numpy", "sympy", "scipy", "mpmath"),
  "verify": ("math_verify", "sympy.physics.units"),
  "gym": ("reasoning_gym",),  # an optional extra
}
# Loaded when they are first asked for, since most runs never do.
LAZY = frozenset({"verify", "gym"})

_IMPORT = re.compile(
  r"""
  (?: ^ | [;:\n(\[,"'] ) [ \t\f]* (?: from | import ) [ \t]+ ([\w., \t]+)
  | (?: import_module | __import__ ) \s* \( \s* ["'] (\w+)
  """,
  re.VERBOSE,
)
_GLANCE = 1 << 16  # characters
_IMAGE_OF = {
  module: image
  for image, modules in IMAGES.items()
  for module in modules
  if "." not in module
}
_RANK = {image: rank for rank, image in enumerate(IMAGES)}


def image_for(code: str) -> str:
  """Returns the name of the cheapest image that has what `code` imports.

  Takes time that is linear in the length of the code, and looks at no more than
  its beginning.
  """
  best = BARE
  code = code[:_GLANCE]
  if not any(module in code for module in _IMAGE_OF):
    return best
  for plain, called in _IMPORT.findall(code):
    for name in (plain or called).split(","):
      words = name.split(".")[0].split()
      image = _IMAGE_OF.get(words[0], BARE) if words else BARE
      best = max(best, image, key=_RANK.__getitem__)
  return best
