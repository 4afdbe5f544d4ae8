// SPDX-License-Identifier: Apache-2.0

package api

// FullStatus has a value in each field.
var FullStatus = fullStatus
