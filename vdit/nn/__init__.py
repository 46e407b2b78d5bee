"""Layers: attention, rotary embedding, patches, convolutions. No config, no mesh, no kernel."""
