"""What sends training's metrics to an experiment tracker (TRACKER)."""
