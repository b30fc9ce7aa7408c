"""Tables: columns, schemas, Delta access, publication, leases, pseudonyms and run records."""
