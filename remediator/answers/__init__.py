"""What people answer by pressing a card's buttons: by callback over HTTP, or by the SDK's long connection."""
