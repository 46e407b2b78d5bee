"""Layers: attention, rotary positions, patches, blocks. No config, no mesh."""
