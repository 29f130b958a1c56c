"""Patches of other libraries, and plugins for them; each registers itself."""
