"""How the demo bundle came to be: pictures drawn by code, captions from a grammar, and the training loops."""
