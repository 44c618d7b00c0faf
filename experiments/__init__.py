"""Where the data side and the device side meet: stages, recipes, and the commands that run them."""
