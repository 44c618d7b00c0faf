"""ML-SUPERB (2305.10615): its data as released, its tracks, its texts, and a miniature in its layout."""
