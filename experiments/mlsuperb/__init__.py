"""Judging encoders by ML-SUPERB: tracks trained and decoded, scored, and tabled beside the published rows."""
