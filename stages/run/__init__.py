"""What every stage shares: settings, the record it was made from, publishing, the lock, starting processes."""
