"""4-bit weights in several processes: collectives, FSDP2, and weights that are sharded already."""
