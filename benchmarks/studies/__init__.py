"""Studies that a decision was made by; each is run by hand, and its README says what it found."""
