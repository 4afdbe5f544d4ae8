// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"

	"lockstep/control/config"
)

func start(startOptions) (daemon, error) { return nil, errors.New("no kernel half yet") }

func unload(*config.Config, *config.Node, bool) error { return errors.New("no kernel half yet") }
