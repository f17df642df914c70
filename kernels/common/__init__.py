"""What two ops use unchanged: backend choice, input checks, counter-based randomness."""
