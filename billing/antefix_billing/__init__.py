"""The bill: usage records, the ledger that keeps them, prices, receipts, exports, proofs. Never needs torch."""
