"""Recipes shipped as package data; yaml files only."""
