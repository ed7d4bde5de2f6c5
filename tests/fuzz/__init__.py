"""What a stranger may hand to qpc, damaged in every way that a random number picks."""
