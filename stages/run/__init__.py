"""What every stage shares: settings, staleness, publishing, the lock, starting processes."""
