"""Pure tensor functions that make an update small: transform, selection, wire. No communication here."""
