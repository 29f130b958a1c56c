"""Measurements: of layers, experts, views and whole models."""
