"""What a row is: a case, what came of it, where it was measured, and the file that keeps it."""
