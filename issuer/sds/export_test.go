package sds

// Rest is for a test: how long it takes to look at very many streams cannot be had in one.
var Rest = rest

// Kept is the bundle with which an issue is tried again, of which these acknowledgements failed one after the other; 0 is of one that was presented only.
func Kept(bundles ...uint64) uint64 {
	failed := map[uint64]ack{}
	for _, bundle := range bundles {
		keep(failed, ack{number: 1, bundle: bundle, presented: bundle == 0})
	}
	return failed[1].bundle
}
