package config

import (
	"errors"
	"fmt"
	"math/big"
	"strings"
	"time"

	"kedge/ca"
)

// Duration is a length of time as people write it: "24h", "90m", "7d", "1h30m", "500ms". A day, d, has 24 hours. It is never negative,
// at most 100 years, and holds exactly what was written.
type Duration time.Duration

const maxDuration = 100 * 365 * 24 * time.Hour

// day is the one unit that Go's own durations lack.
const day = 24 * time.Hour

var durationUnits = []struct {
	name string
	unit time.Duration
}{ // those first that others begin with
	{"ms", time.Millisecond}, {"us", time.Microsecond}, {"µs", time.Microsecond}, {"ns", time.Nanosecond},
	{"d", day}, {"h", time.Hour}, {"m", time.Minute}, {"s", time.Second},
}

// ParseDuration reads what String writes, and every other way of writing it that loses nothing.
func ParseDuration(text string) (Duration, error) {
	switch {
	case text == "":
		return 0, errors.New(`is empty: write a duration like "24h", "90m" or "7d"`)
	case len(text) > 40:
		return 0, fmt.Errorf("%.40q… is too long for a duration", text)
	case text == "0":
		return 0, nil
	case strings.HasPrefix(text, "-"):
		return 0, fmt.Errorf("%q is negative", text)
	}
	sum := new(big.Rat)
	for rest := text; rest != ""; {
		digits := strings.IndexFunc(rest, func(r rune) bool { return r != '.' && (r < '0' || r > '9') })
		if digits < 0 {
			return 0, fmt.Errorf(`%q lacks a unit: write d, h, m, s or ms after the number, like "%s"`, text, rest+"h")
		}
		number, ok := new(big.Rat).SetString(rest[:digits])
		if !ok {
			return 0, notDuration(text)
		}
		rest = rest[digits:]
		unit := time.Duration(0)
		for _, u := range durationUnits {
			if after, ok := strings.CutPrefix(rest, u.name); ok {
				unit, rest = u.unit, after
				break
			}
		}
		if unit == 0 {
			return 0, notDuration(text)
		}
		sum.Add(sum, number.Mul(number, new(big.Rat).SetInt64(int64(unit))))
	}
	if sum.Cmp(new(big.Rat).SetInt64(int64(maxDuration))) > 0 {
		return 0, fmt.Errorf("%q is more than 100 years", text)
	}
	if !sum.IsInt() {
		return 0, fmt.Errorf("%q is not a whole number of nanoseconds", text)
	}
	return Duration(sum.Num().Int64()), nil
}

func notDuration(text string) error {
	return fmt.Errorf(`%q is not a duration: write one like "24h", "90m", "7d" or "1h30m"`, text)
}

// String writes whole days from two days on as days, and no zeros: "7d", "24h", "1h30m".
func (d Duration) String() string { return ca.DurationText(time.Duration(d)) }

// MarshalText makes the duration appear as String writes it.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Set and Type make a flag of it (pflag.Value), which is written as in the file.
func (d *Duration) Set(text string) (err error) {
	*d, err = ParseDuration(text)
	return err
}

// Type is what a usage text calls it.
func (d *Duration) Type() string { return "duration" }

// Std is the duration as the standard library has it.
func (d Duration) Std() time.Duration { return time.Duration(d) }
