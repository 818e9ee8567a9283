"""Low-rank changes of linear layers, trained and merged so that every zero stays."""
