"""Pages on the user's own machine. Bound to the loopback address; nothing is loaded from elsewhere, nothing kept unless asked."""
