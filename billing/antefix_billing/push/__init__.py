"""Usage on its way to a billing system: read from ledgers, sent, and noted as sent. At least once, with stable ids."""
