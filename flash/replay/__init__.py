"""What a run's log is good for afterwards: read, rescored, trained again, exported."""
