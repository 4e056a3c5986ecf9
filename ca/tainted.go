package ca

import "kedge/ca/ledger"

// Tainted are the authorities whose certificates are to be replaced at once: those that are tainted, removed ones too, and those under them.
func (c *CA) Tainted() (map[ledger.Hash]bool, error) {
	records, err := c.ledger.Authorities()
	if err != nil {
		return nil, err
	}
	keys, tainted := taintedKeys(records), map[ledger.Hash]bool{}
	for _, record := range records {
		if _, ok := keys[record.Key]; ok {
			tainted[record.ID] = true
		}
	}
	return tainted, nil
}
