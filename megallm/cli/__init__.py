"""The console command `megallm`: one file a sub-command."""
