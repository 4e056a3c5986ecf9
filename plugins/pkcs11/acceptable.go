package pkcs11

import (
	"errors"
	"fmt"

	"kedge/hsm"
)

// Acceptable says whether a key may be an authority's by what its token says of it. One that can be exported, or that was once elsewhere, may have a copy: then the error says so, unless
// that is allowed. What a token does not say it is not asked for: NSS never says that a key was made on it, but that it was never extractable.
func Acceptable(k hsm.Key, allowExportable bool) error {
	if k.AlwaysAuthenticate == hsm.Yes {
		return fmt.Errorf("the token wants the PIN for each signature of the %s (CKA_ALWAYS_AUTHENTICATE): make one that does not ('kedge key create')", k)
	}
	if allowExportable {
		return nil
	}
	mend := "make one on the token ('kedge key create'), or set pkcs11.allowExportableKeys"
	switch {
	case k.Extractable == hsm.Yes:
		return fmt.Errorf("the token says that the %s can be exported (CKA_EXTRACTABLE): %s", k, mend)
	case k.Sensitive == hsm.No:
		return fmt.Errorf("the token says that the %s can be read (CKA_SENSITIVE is false): %s", k, mend)
	case k.NeverExtractable == hsm.No:
		return fmt.Errorf("the token says that the %s could once be exported, or came from elsewhere (CKA_NEVER_EXTRACTABLE is false): %s", k, mend)
	case k.Local == hsm.No && k.NeverExtractable != hsm.Yes:
		return fmt.Errorf("the token says that the %s was not made on it (CKA_LOCAL is false): %s", k, mend)
	}
	return nil
}

var errNoToken = errors.New("there is no token")
