"""The host side: Python and numpy only, so that no tool grabs a chip."""
