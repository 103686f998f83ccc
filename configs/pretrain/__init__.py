"""Yaml files only."""
