"""What a run will need: memory, time, dollars and disk, before it starts."""
