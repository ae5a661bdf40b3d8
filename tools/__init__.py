"""Programs beside the three scripts: convert, check, reproduce, pictures, report page, share, doctor, replay."""
