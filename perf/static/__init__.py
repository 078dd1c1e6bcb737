"""What machine code and plans say without a clock: registers, access widths, bytes, passes."""
