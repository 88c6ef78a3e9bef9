"""What make itself starts: plan, help, verify. Standard library only."""
