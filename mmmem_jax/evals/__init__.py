"""Evaluation: the protocol, the results table, the HTML report."""
