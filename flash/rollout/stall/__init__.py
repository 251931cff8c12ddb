"""No wait is silent: deadlines of all waits, and why nothing moves."""
