"""Playgrounds: characters with materials and faces, places with their gravity, things in motion."""
