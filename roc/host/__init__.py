"""The host side: Python and numpy only, so that no process here grabs a chip."""
