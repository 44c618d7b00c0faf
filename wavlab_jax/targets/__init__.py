"""What a masked frame is asked for: units from k-means here; other targets bring a file of their own."""
