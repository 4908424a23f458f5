"""Folders as Meta published them: params.json with consolidated.NN.pth, read and written."""
