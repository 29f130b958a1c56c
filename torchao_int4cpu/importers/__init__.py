"""From the 4-bit formats of other tools to ours."""
