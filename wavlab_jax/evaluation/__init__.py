"""Judging: masked accuracy on held-out clips beside trivial predictors, and a linear probe for language."""
