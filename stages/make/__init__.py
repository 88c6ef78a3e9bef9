"""What make itself starts: stale stages, status, history, help, verify. Standard library only."""
