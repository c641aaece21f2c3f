"""Units that several commands print."""

MIB = 1 << 20
