"""Configs as frozen dataclasses, their flags, presets and rules."""
