"""What a 4-bit weight is, how its bytes lie, and the one contract of its parts."""
